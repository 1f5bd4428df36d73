"""Auto-tuning: measure the choices that schedules leave open, keep the best. See README.md here."""
