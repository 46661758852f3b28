"""The controller: owns requests, pages and batches, and tells the workers what to run. Imports no torch."""
