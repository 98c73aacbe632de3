"""Web pages over runs and federations: no framework in the browser, nothing fetched from elsewhere."""
