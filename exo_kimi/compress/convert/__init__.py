"""Any layout that we load to MLX's mixed bits by a recipe, a block of rows at a time."""
