"""What `casemate check` looks at, by area. Each check is a function of CheckContext that gives results."""
