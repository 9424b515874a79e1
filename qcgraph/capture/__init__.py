"""Capture of a module as a program: traced with torch.export, brought to one form, compared with the module."""
