// Package tig stands for one of nerdctl's own, of its tests: its command links a helper of theirs, and the
// module that has the package is nested, and in no registry. Nothing that nerdctl does calls it.
package tig

// T is what that helper wants of a running test.
type T interface {
	Log(args ...any)
	FailNow()
}
