"""The invented world of the sample data (world.py) and how each language puts it into words."""
