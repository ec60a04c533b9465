"""Attribution maps measured against masks."""
