"""Work over many documents or questions: steps and executors."""
