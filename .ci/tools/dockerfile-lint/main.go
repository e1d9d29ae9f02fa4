// Prints what BuildKit's own checks say of a Dockerfile, all of its stages, as `docker build --check` would; no engine
// is asked. Ends with 1 where there is anything to say.
package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/moby/buildkit/frontend/dockerfile/dockerfile2llb"
	"github.com/moby/buildkit/frontend/dockerui"
	digest "github.com/opencontainers/go-digest"
)

// noRegistry stands for every base image: one without settings of its own.
type noRegistry struct{}

func (noRegistry) ResolveImageConfig(_ context.Context, ref string, _ sourceresolver.Opt) (string, digest.Digest, []byte, error) {
	config := []byte(`{"architecture": "amd64", "os": "linux", "config": {}}`)
	return ref, digest.FromBytes(config), config, nil
}

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: dockerfile-lint DOCKERFILE [BUILD_ARG=VALUE …]")
		os.Exit(64)
	}
	name := os.Args[1]
	text, err := os.ReadFile(name)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(64)
	}
	arguments := map[string]string{}
	for _, argument := range os.Args[2:] {
		key, value, _ := strings.Cut(argument, "=")
		arguments[key] = value
	}
	source := llb.NewSourceMap(nil, name, "Dockerfile", text)
	source.Definition = &llb.Definition{}
	found, err := dockerfile2llb.DockerfileLint(context.Background(), text, dockerfile2llb.ConvertOpt{
		Config:       dockerui.Config{BuildArgs: arguments},
		MetaResolver: noRegistry{},
		SourceMap:    source,
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for _, warning := range found.Warnings {
		line := int32(0)
		if ranges := warning.Location.GetRanges(); len(ranges) > 0 {
			line = ranges[0].Start.Line
		}
		fmt.Printf("%s:%d: %s: %s\n", name, line, warning.RuleName, warning.Detail)
	}
	if found.Error != nil {
		line := int32(0)
		if ranges := found.Error.Location.GetRanges(); len(ranges) > 0 {
			line = ranges[0].Start.Line
		}
		fmt.Printf("%s:%d: %s\n", name, line, found.Error.Message)
	}
	if len(found.Warnings) > 0 || found.Error != nil {
		os.Exit(1)
	}
}
