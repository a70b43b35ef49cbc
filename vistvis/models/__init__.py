"""What is known of models: their attention modules, families, layouts, and how to load them."""
