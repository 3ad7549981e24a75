"""Moving bytes: the Hub, folders, shared storage, and where artifacts go. No torch."""
