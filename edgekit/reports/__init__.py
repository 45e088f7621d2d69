"""What people read: tables for the terminal, and one HTML page."""
