"""Pictures, figures and pages of attention; what is drawn is computed elsewhere."""
