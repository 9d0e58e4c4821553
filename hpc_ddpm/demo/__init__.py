"""The main job end to end on embedded or given data, with a report."""
