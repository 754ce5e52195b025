"""What a model is between importing and code: nodes, layouts, programs."""
