if not __name__.startswith("surgery."):
    raise ImportError("import surgery.backends instead of backends (the folder is a sub-package of surgery)")
