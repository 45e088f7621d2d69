"""Examples that EdgeKit carries: trained models with the data that measures them."""
