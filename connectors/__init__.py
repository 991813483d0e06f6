"""Archives and bitstreams inside other tools: one module a tool, each imports its tool alone."""
