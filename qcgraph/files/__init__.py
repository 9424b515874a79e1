"""Reading and writing files: documents that somebody else wrote, and folders that change as a whole."""
