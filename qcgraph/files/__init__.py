"""Reading and writing files: documents that anybody may have written, and folders that change as a whole."""
