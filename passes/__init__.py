if not __name__.startswith("surgery."):
    raise ImportError("import surgery.passes instead of passes (the folder is a sub-package of surgery)")
