"""Labels of units and their check."""
