"""The only room that sees all others: compiles a model by a recipe, and says what that gives and costs."""
