"""Pictures of what a trained network looks at, and of what it does with a whole image set."""
