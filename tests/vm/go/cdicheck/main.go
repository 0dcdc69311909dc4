// Says what is wrong with a CDI specification, a JSON document on standard input: by the project's public JSON schema, and
// by the reader that clients have. Nothing and status 0 if nothing is.
package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"

	"tags.cncf.io/container-device-interface/pkg/cdi"
	"tags.cncf.io/container-device-interface/schema"
)

func main() {
	data, err := io.ReadAll(os.Stdin)
	if err == nil {
		err = check(data)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func check(data []byte) error {
	if err := schema.BuiltinSchema().ValidateData(data); err != nil {
		return fmt.Errorf("schema: %w", err)
	}
	// The reader wants a file, and goes by its name's end.
	directory, err := os.MkdirTemp("", "cdicheck")
	if err != nil {
		return err
	}
	defer os.RemoveAll(directory)
	path := filepath.Join(directory, "spec.json")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		return err
	}
	if _, err := cdi.ReadSpec(path, 0); err != nil {
		return fmt.Errorf("reader: %w", err)
	}
	return nil
}
