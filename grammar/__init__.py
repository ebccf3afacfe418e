if not __name__.startswith("surgery."):
    raise ImportError("import surgery.grammar instead of grammar (the folder is a sub-package of surgery)")
