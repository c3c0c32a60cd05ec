"""Small models and miniature corpora in the true layouts, so that you can test without weights or downloads."""
