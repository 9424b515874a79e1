"""Passes that sample the statistics that later passes decide by."""
