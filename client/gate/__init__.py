"""The gate at a site: what may run on the site's data, what may leave, and a record of both."""
