"""Training of the collapsed model: packed data, the Lightning module, its optimizer and adapters."""
