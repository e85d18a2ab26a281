"""The command and what it shows: models, data, inspection, reports, the demo."""
