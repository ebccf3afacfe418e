"""The command line: one verb a file, ``main`` finds the file and runs it."""
