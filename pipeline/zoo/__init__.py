"""Reading and validating zoo files; the recipes, gates and tables that quantmill ships for them."""
