"""What a run shows a person: report.html and its pictures. Only this package and reproduce/ load matplotlib."""
