"""The scheduler, and the accounting of KV memory; without torch."""
