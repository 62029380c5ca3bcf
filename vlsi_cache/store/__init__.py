"""The cache on disk: FORMAT.md says what it is, writer.py how it gets there, reader.py how it is read."""
