"""The request handlers, one module per API; `route_table.OPERATIONS` lists them all."""
