"""What a trained model says of records: answers of files, evaluations, explanations."""
