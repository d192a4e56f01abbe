"""A qvl backend that answers with the colours of the pictures it is shown."""
