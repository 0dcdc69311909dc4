// Prints the CDI specification that NVIDIA's container toolkit makes of a driver in a directory, with the code of
// `nvidia-ctk cdi generate --mode=nvml`. What NVML would say of the GPUs, its authors' mock of a DGX H100 says.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/dgxh100"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/gpus"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/server"
	"github.com/NVIDIA/nvidia-container-toolkit/pkg/nvcdi"
	"github.com/NVIDIA/nvidia-container-toolkit/pkg/nvcdi/transform"
)

// Arguments: the directory, the driver's version, how many GPUs there are.
func main() {
	root, version := os.Args[1], os.Args[2]
	count, err := strconv.Atoi(os.Args[3])
	check(err)
	machine := dgxh100.NewWithGPUs(gpus.Multiple(count, gpus.H100_SXM5_80GB)...)
	machine.SystemGetDriverVersionFunc = func() (string, nvml.Return) { return version, nvml.SUCCESS }
	for _, device := range machine.Devices {
		// The mock has no word about parts of GPUs unless it is told one.
		device.(*server.Device).GetMaxMigDeviceCountFunc = func() (int, nvml.Return) { return 0, nvml.SUCCESS }
	}
	generator, err := nvcdi.New(
		nvcdi.WithMode(nvcdi.ModeNvml),
		nvcdi.WithNvmlLib(machine),
		nvcdi.WithDriverRoot(root),
		nvcdi.WithDevRoot(root),
		nvcdi.WithMergedDeviceOptions(transform.WithName("all"), transform.WithSkipIfExists(true)),
		nvcdi.WithFeatureFlags(nvcdi.FeatureDisableNvsandboxUtils),
	)
	check(err)
	spec, err := generator.GetSpec("all")
	check(err)
	check(json.NewEncoder(os.Stdout).Encode(spec.Raw()))
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
