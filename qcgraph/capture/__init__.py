"""How a module becomes a program: captured with torch.export, brought to one form, compared with the module."""
