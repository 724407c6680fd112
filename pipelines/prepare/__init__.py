"""From a publisher's files to the prepared format: one module a data set, and the stages that they share."""
