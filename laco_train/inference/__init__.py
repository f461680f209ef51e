"""How fast models read and write, and in what memory."""
