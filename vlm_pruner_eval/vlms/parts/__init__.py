"""Parts that several families share; a file of this folder is no family."""
