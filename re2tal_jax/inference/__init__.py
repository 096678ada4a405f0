"""From a trained detector to detections, their evaluation and a report."""
