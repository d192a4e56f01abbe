"""The handlers, one file a family; `route_table.OPERATIONS` lists them all."""
