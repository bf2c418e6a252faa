"""Views of a whole image set: each computes its figures, draws them, and returns a section of the page."""
