"""What `besa report` makes of run folders: tables, figures and one page. No torch and no Hydra here."""
