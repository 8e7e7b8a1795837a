// Colour. Sequential ramps run away from the page, so nothing fades into the paper and much stands out, in both themes
// and in print; lightness is monotone, so they read the same with any colour vision. Categories are Okabe and Ito's.

const RAMPS = {
  light: {
    sequential: ["#f3f3ea", "#c7e0bf", "#86ccac", "#35b5a9", "#0995a4", "#067599", "#015492", "#1f327a", "#221556"],
    diverging: ["#0053a4", "#418ad1", "#98c3e8", "#f3f2ee", "#edb886", "#d77435", "#a24112"],
  },
  dark: {
    sequential: ["#1f2030", "#29396c", "#215791", "#0076a1", "#0a93a7", "#1fb0a9", "#5ecdaa", "#a3e6a0", "#ecf999"],
    diverging: ["#7dcffe", "#4790d8", "#325384", "#22242b", "#7f4726", "#d67b34", "#fec675"],
  },
};
const CATEGORIES = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8c8c8c"];

const night = matchMedia("(prefers-color-scheme: dark)");
const printing = () => document.documentElement.hasAttribute("data-print");
const ramps = () => RAMPS[night.matches && !printing() ? "dark" : "light"];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

// The colour at t in [0, 1] on a ramp, as [red, green, blue].
function colourAt(ramp, t) {
  const x = Math.min(1, Math.max(0, t)) * (ramp.length - 1);
  const i = Math.min(ramp.length - 2, Math.floor(x));
  const [a, b] = [channels(ramp[i]), channels(ramp[i + 1])];
  return a.map((value, c) => Math.round(value + (b[c] - value) * (x - i)));
}

const rgb = (colour) => `rgb(${colour.join(",")})`;

// Relative luminance (WCAG 2) of a colour.
function luminance(colour) {
  const linear = colour.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}

const inkOn = (colour) => (luminance(colour) > 0.18 ? "#15161a" : "#ffffff");

// A table of 256 colours for drawing bytes.
const palette = (ramp) => Array.from({ length: 256 }, (_, i) => colourAt(ramp, i / 255));

const plotlyScale = (ramp) => ramp.map((colour, i) => [i / (ramp.length - 1), colour]);

const gradient = (ramp) => `linear-gradient(to right, ${ramp.join(",")})`;

const bandColour = (hex, share) => `rgba(${channels(hex).join(",")},${share})`;
