"""Files from elsewhere: limits, a watchdog, and readers that run nothing that a file asks for."""
