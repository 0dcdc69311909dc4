// Program interop is Go's side of the tests of rpc/: a peer that speaks ttrpc as containerd does, and
// the descriptors of containerd's own messages.
package main

import (
	"fmt"
	"os"
)

func main() {
	var err error
	switch {
	case len(os.Args) == 3 && os.Args[1] == "serve":
		err = serve(os.Args[2])
	case len(os.Args) == 3 && os.Args[1] == "call":
		err = call(os.Args[2])
	case len(os.Args) == 2 && os.Args[1] == "describe":
		err = describe()
	default:
		err = fmt.Errorf("usage: %s serve SOCKET | call SOCKET | describe", os.Args[0])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
