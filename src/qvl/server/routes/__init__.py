"""The handlers, one file a family; `operations.OPERATIONS` lists them all."""
