"""What is foreseen for machines that are described, and searches among settings."""
